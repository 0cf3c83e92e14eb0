"""The published configurations of the papers, as far as data and machines allow: `wellposed run SLUG --scale paper`.

One module a paper, named as its study; arms and settings stand in the card's `[protocol.paper]`.
"""

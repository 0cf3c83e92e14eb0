"""`wellposed tune` on a paper's study: its method's strengths, on the study's own problem."""

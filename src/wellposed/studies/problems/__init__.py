"""Problems that studies share: data with known truth, re-drawn by a seed."""

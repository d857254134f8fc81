"""Data as people have it: arrays, data frames, lists of numbers and data sets of single samples become tensors.

``values`` turns what is no tensor into one. ``samples`` makes batches of data sets whose items are single samples.
"""

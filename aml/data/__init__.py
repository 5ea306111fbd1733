"""Referring-segmentation data: annotations, rendered scenes, training and evaluation sets."""

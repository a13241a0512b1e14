"""Signatures of images: what signs an image, and whether it may be believed."""

"""Pixels in: bytes to pixels, sources of images, crops, and the data set that training reads."""

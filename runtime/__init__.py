"""The torch-free side: a bundle and a picture become frames."""

"""``Dashboard``: a page that shows and steers runs, served by the training process itself."""

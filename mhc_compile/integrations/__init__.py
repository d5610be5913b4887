"""What other libraries call things, and where this package has to follow them."""

"""Every code, with what it means and what a user can do about it."""

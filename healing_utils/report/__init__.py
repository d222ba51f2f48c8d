"""Tables and figures as a reader sees them."""

"""Make the router agree with the experts that are left."""

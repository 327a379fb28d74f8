"""What samples teach, and the fit of one layer after the other."""

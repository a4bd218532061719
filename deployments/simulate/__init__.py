"""What would have happened: recorded requests, served again by the real code under a virtual clock."""

"""Which requests are kept, and for how many each of them stands."""

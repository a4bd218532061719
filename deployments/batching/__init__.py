"""The queue in front of the device: which inputs run together, and when. Plain asyncio, no Ray, no torch."""

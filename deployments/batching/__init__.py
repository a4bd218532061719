"""What runs together and when: the queue in front of the device. Plain asyncio, no Ray, no torch."""

"""What a worker tells about its machine: hardware, power and the heartbeat.

Nothing here raises for want of a sensor, and no reading of one can hold up a beat.
"""

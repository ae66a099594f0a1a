"""Where vectors lie: the interface and the three stores that come with it."""

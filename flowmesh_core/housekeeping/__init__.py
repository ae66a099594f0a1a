"""What has been reported, what is left on disk, and the removal of what is old."""

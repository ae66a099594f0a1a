"""Task folders, manifests, archives, and what is fetched or shipped."""

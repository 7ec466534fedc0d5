"""The artifact backend: an archive in ZenML's own artifact store."""

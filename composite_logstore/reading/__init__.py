"""Pages of a stream, as `fetch()` returns them."""

"""The Elasticsearch backend: writes to and reads from Elasticsearch and OpenSearch."""

"""From an event to its backends: the journal, deliveries, and the threads that carry them out."""

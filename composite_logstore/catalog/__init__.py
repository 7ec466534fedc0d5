"""The catalog: log stores, children, runs and log streams, as ZenML has registered them."""

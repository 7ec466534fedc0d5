"""The component backend: any log store that is registered in ZenML."""

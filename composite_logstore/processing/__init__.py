"""What happens to events on their way to one child: some are withheld from it, others are changed."""

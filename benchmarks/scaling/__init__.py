"""What happens when the tasks of a meta-step are spread over many devices."""

"""What the library costs, measured in one run next to the same work done by hand."""

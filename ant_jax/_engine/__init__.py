"""The compiled programs, the buffers that they donate, and how many steps a launch has."""

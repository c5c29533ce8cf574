"""The bodies of the six commands: order of work, files and records. They print nothing."""

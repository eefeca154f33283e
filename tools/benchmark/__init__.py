"""What the tools measure, one module a question, and `command`, which all of them are started by."""

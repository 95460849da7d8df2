"""The endpoint picker: tells Envoy, through its external processing, which workers get a request."""

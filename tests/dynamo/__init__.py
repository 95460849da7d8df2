"""eldr's component for Dynamo. What needs Dynamo itself runs with `make test-dynamo`."""

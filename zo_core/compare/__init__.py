"""Compare arms over seeds and tasks, and say which claims of the paper hold on this model."""

"""MLflow. Imports no other wing, and no other wing imports it or mlflow."""

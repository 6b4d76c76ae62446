"""What the containers of a cluster are told by variables, whoever lends the machines."""

# Ray's exporters of numbers listen on all addresses and ask for no token. An impossible port is the only way to have
# the dashboard's and the autoscaler's not start; a spec that has them scraped sets these in its `env`.
NO_EXPORTERS = {"RAY_enable_metrics_collection": "false", "DASHBOARD_METRIC_PORT": "-1", "AUTOSCALER_METRIC_PORT": "-1"}

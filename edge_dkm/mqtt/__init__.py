"""Everything that speaks MQTT: the connection, what goes out in which order, TLS, the broker for a first try."""

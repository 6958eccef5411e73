"""What a line has to run for years unattended: service manager, watchdog, health over HTTP, metrics, logs, the admin socket."""

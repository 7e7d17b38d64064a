"""Where experts live: replicas packed onto ranks so that the busiest link, port or rank is least busy."""

"""Models as services: the engine that generates for many requests at once, and the HTTP service over it."""

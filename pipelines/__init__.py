"""From a request to a saved result. Import the modules by name: `pipelines.request`, `pipelines.generate`, ..."""

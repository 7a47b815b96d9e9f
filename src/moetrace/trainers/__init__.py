"""Routes in the trainers people use: one module for each. Importing this package imports none of them."""

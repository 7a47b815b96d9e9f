"""OpenAI's endpoints, in its shapes exactly: no routing field goes in or comes out."""

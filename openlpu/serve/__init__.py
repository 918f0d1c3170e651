"""In: HTTP requests in OpenAI's forms. Out: answers of one model, always the same bits."""

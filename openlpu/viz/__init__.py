"""In: a Program. Out: what people look at: utilization figures, a trace, a page with the chip."""

//! Generation, sampling, loss and perplexity.

// Rows as scaled differences to other rows, for products that are computed elsewhere: what the rows
// have in common is then rounded once, as in int8.h.

// x[r] = (x[r] - x[references[r]]) scale where that is another row, which is its own reference.
void to_relative(float* x, int64_t rows, int64_t d, const int32_t* references, float scale) {
    for_each_row(rows, [&](int64_t r) {
        if (references[r] == r) return;
        float* to = x + r * d;
        const float* base = x + references[r] * d;
        for (int64_t j = 0; j < d; ++j) to[j] = (to[j] - base[j]) * scale;
    });
}

// The way back after a product: y[r] = y[r] / scale + y[references[r]].
void from_relative(float* y, int64_t rows, int64_t d, const int32_t* references, float scale) {
    const float back = 1 / scale;  // exact, of a power of two
    for_each_row(rows, [&](int64_t r) {
        if (references[r] == r) return;
        float* to = y + r * d;
        const float* base = y + references[r] * d;
        for (int64_t j = 0; j < d; ++j) to[j] = to[j] * back + base[j];
    });
}

// Python bindings: they trust nothing about shapes, release the GIL and call the chosen table.
// What several arguments say together is a class, whose arrays live as long as it does.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace fwdllm;

namespace {

template <typename T, int N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Bytes = In<uint8_t, 2>;
using Vector = In<float, 1>;
using Matrix = In<float, 2>;

void require(bool ok, const char* what) {
    if (!ok) throw nb::value_error(what);
}

int distribution_code(const std::string& name) {
    if (name == "normal") return kNormal;
    if (name == "rademacher") return kRademacher;
    throw nb::value_error("distribution is 'normal' or 'rademacher'");
}

double peak(const std::string& kind) {
    const char* kinds[] = {"int8", "bf16", "fp32", "read"};
    for (int i = 0; i < 4; ++i) {
        if (kind != kinds[i]) continue;
        nb::gil_scoped_release release_gil;
        return kernels().peak((Peak)i);
    }
    throw nb::value_error("kind is 'int8', 'bf16', 'fp32' or 'read'");
}

struct BlockSize {
    int64_t elements;
    size_t bytes;
};

BlockSize block_size(int type) {
    switch (type) {
        case F32:
            return {1, 4};
        case F16:
        case BF16:
            return {1, 2};
        case Q4_0:
            return {32, 18};
        case Q4_1:
            return {32, 20};
        case Q5_0:
            return {32, 22};
        case Q5_1:
            return {32, 24};
        case Q8_0:
            return {32, 34};
        case Q2_K:
            return {256, 84};
        case Q3_K:
            return {256, 110};
        case Q4_K:
            return {256, 144};
        case Q5_K:
            return {256, 176};
        case Q6_K:
            return {256, 210};
        case IQ4_NL:
            return {32, 18};
        case IQ4_XS:
            return {256, 136};
        case MXFP4:
            return {32, 17};
    }
    throw nb::value_error("unsupported tensor type");
}

// A quantized matrix of rows of n_in elements.
struct WeightArgument {
    Bytes data;
    Weight weight;

    WeightArgument(Bytes bytes, int type, int64_t n_in) : data(bytes) {
        const BlockSize block = block_size(type);
        require(n_in > 0 && n_in % block.elements == 0, "a row is not whole blocks");
        const size_t row_bytes = (size_t)(n_in / block.elements) * block.bytes;
        require(data.shape(1) == row_bytes, "the bytes of a row do not fit its type and length");
        weight = {data.data(), type, (int64_t)data.shape(0), n_in, row_bytes};
    }
};

// A factor of an adapter and how its direction is made: mask [size] or basis [n_basis, width].
struct FactorArgument {
    Matrix values;
    uint64_t offset;
    std::optional<Vector> mask;
    std::optional<Matrix> basis;

    FactorDirection direction(int64_t width) const {
        require(!mask || mask->shape(0) == values.size(), "a mask does not fit its factor");
        require(!basis || (int64_t)basis->shape(1) == width, "a basis does not fit its factor");
        return {offset, mask ? mask->data() : nullptr, basis.has_value(),
                basis ? basis->data() : nullptr, basis ? (int64_t)basis->shape(0) : 0};
    }
};

struct LoraArgument {
    FactorArgument a, b;
    float scale;

    LoRA of(int64_t n_in, int64_t n_out) const {
        const Matrix &of_a = a.values, &of_b = b.values;
        const int64_t rank = (int64_t)of_a.shape(0);
        require(rank > 0 && (int64_t)of_a.shape(1) == n_in, "A is [rank, n_in]");
        require((int64_t)of_b.shape(0) == n_out && (int64_t)of_b.shape(1) == rank,
                "B is [n_out, rank]");
        return {of_a.data(), of_b.data(), scale, rank, a.direction(n_in), b.direction(n_out)};
    }
};

// seeds [n_lanes, n_parts], coefficients [n_lanes], starts [n_parts + 1] in the rows of a lane.
struct LanesArgument {
    In<uint64_t, 2> seeds;
    Vector coefficients;
    In<int32_t, 1> starts;
    std::string distribution;
    bool tangents;

    Lanes of(size_t rows) const {
        const int64_t n = (int64_t)seeds.shape(0), n_parts = (int64_t)seeds.shape(1);
        const int32_t* at = starts.data();
        require(n > 0 && (int64_t)coefficients.shape(0) == n, "one coefficient per lane");
        require(rows % n == 0, "the rows are not whole lanes");
        require((int64_t)starts.shape(0) == n_parts + 1 && at[0] == 0 &&
                    at[n_parts] == (int64_t)rows / n,
                "parts are not the rows of a lane");
        for (int64_t p = 0; p < n_parts; ++p) require(at[p] <= at[p + 1], "parts do not ascend");
        require(!tangents || coefficients.data()[0] == 0, "lane 0 is not plain");
        const int code = distribution_code(distribution);
        return {seeds.data(), coefficients.data(), n, code, tangents, at, n_parts};
    }
};

void philox(uint64_t seed, uint64_t start, Out<uint32_t, 2> out) {
    require(out.shape(1) == 4, "out is [count, 4]");
    nb::gil_scoped_release release_gil;
    kernels().philox(seed, start, (int64_t)out.shape(0), out.data());
}

void random_values(const std::string& distribution, uint64_t seed, uint64_t start,
                   Out<float, 1> out) {
    const int code = distribution_code(distribution);
    nb::gil_scoped_release release_gil;
    kernels().random_values(code, seed, start, (int64_t)out.shape(0), out.data());
}

void seeded_axpy(Out<float, 1> theta, In<uint64_t, 1> seeds, Vector coefficients, uint64_t offset,
                 const std::string& distribution) {
    require(seeds.shape(0) == coefficients.shape(0), "one coefficient per seed");
    const int code = distribution_code(distribution);
    nb::gil_scoped_release release_gil;
    kernels().seeded_axpy(theta.data(), (int64_t)theta.shape(0), seeds.data(), coefficients.data(),
                          (int64_t)seeds.shape(0), offset, code);
}

void seeded_dot(Vector g, In<uint64_t, 1> seeds, uint64_t offset, const std::string& distribution,
                Out<double, 1> out) {
    require(seeds.shape(0) == out.shape(0), "one result per seed");
    const int code = distribution_code(distribution);
    nb::gil_scoped_release release_gil;
    kernels().seeded_dot(g.data(), (int64_t)g.shape(0), seeds.data(), (int64_t)seeds.shape(0),
                         offset, code, out.data());
}

void gather(const WeightArgument& weight, In<int32_t, 1> ids, Out<float, 2> out) {
    const Weight& w = weight.weight;
    require(out.shape(0) == ids.shape(0) && (int64_t)out.shape(1) == w.n_in, "out is [rows, n_in]");
    for (size_t i = 0; i < ids.shape(0); ++i)
        require(ids.data()[i] >= 0 && ids.data()[i] < w.n_out, "an id is outside the table");
    nb::gil_scoped_release release_gil;
    kernels().gather(w, ids.data(), (int64_t)ids.shape(0), out.data());
}

// Rows may only refer to earlier ones, and those to themselves.
const int32_t* references_of(const In<int32_t, 1>& references, size_t rows) {
    const int32_t* r = references.data();
    require(references.shape(0) == rows, "one reference a row");
    for (size_t i = 0; i < rows; ++i)
        require(r[i] >= 0 && r[i] <= (int64_t)i && r[r[i]] == r[i],
                "a reference is not an earlier row");
    return r;
}

// tangents: rows are 1 + tangents equal slices.
void require_tangents(size_t rows, int64_t tangents) {
    require(tangents >= 0 && rows % (1 + tangents) == 0, "the rows are not a primal and tangents");
}

void require_softcap(float softcap) { require(softcap >= 0, "a soft cap is not below 0"); }

void matmul(Matrix x, const WeightArgument& weight, std::optional<Vector> bias,
            const LoraArgument* lora, const LanesArgument& lanes, In<int32_t, 1> references,
            bool exact, Out<float, 2> y) {
    const Weight& w = weight.weight;
    require((int64_t)x.shape(1) == w.n_in, "x is [rows, n_in]");
    const int32_t* r = references_of(references, x.shape(0));
    require(y.shape(0) == x.shape(0) && (int64_t)y.shape(1) == w.n_out, "y is [rows, n_out]");
    require(!bias || (int64_t)bias->shape(0) == w.n_out, "bias is [n_out]");
    const float* b = bias ? bias->data() : nullptr;
    const Lanes variants = lanes.of(x.shape(0));
    LoRA term{};
    if (lora) term = lora->of(w.n_in, w.n_out);
    nb::gil_scoped_release release_gil;
    kernels().matmul(x.data(), (int64_t)x.shape(0), r, w, b, lora ? &term : nullptr, variants,
                     exact, y.data());
}

void add_lora(Matrix x, const LoraArgument& lora, const LanesArgument& lanes, Out<float, 2> y) {
    require(y.shape(0) == x.shape(0), "y is [rows, n_out]");
    const int64_t n_in = (int64_t)x.shape(1), n_out = (int64_t)y.shape(1);
    const LoRA term = lora.of(n_in, n_out);
    const Lanes variants = lanes.of(x.shape(0));
    nb::gil_scoped_release release_gil;
    kernels().add_lora(x.data(), (int64_t)x.shape(0), n_in, n_out, term, variants, y.data());
}

void to_relative(Out<float, 2> x, In<int32_t, 1> references, Out<float, 1> scales) {
    const int32_t* r = references_of(references, x.shape(0));
    require(scales.shape(0) == x.shape(0), "one scale a row");
    nb::gil_scoped_release release_gil;
    kernels().to_relative(x.data(), (int64_t)x.shape(0), (int64_t)x.shape(1), r, scales.data());
}

void from_relative(Out<float, 2> y, In<int32_t, 1> references, Vector scales) {
    const int32_t* r = references_of(references, y.shape(0));
    require(scales.shape(0) == y.shape(0), "one scale a row");
    nb::gil_scoped_release release_gil;
    kernels().from_relative(y.data(), (int64_t)y.shape(0), (int64_t)y.shape(1), r, scales.data());
}

void cross_entropy(Matrix x, const WeightArgument& weight, In<int32_t, 1> labels,
                   In<int32_t, 1> references, int64_t tangents, float softcap, bool exact,
                   Out<double, 1> nll) {
    require_tangents(x.shape(0), tangents);
    require_softcap(softcap);
    const Weight& w = weight.weight;
    require((int64_t)x.shape(1) == w.n_in, "x is [rows, n_in]");
    const int32_t* refs = references_of(references, x.shape(0));
    require(labels.shape(0) == x.shape(0) && nll.shape(0) == x.shape(0),
            "one label and result a row");
    for (size_t i = 0; i < labels.shape(0); ++i)
        require(labels.data()[i] >= 0 && labels.data()[i] < w.n_out,
                "a label is outside the vocabulary");
    nb::gil_scoped_release release_gil;
    kernels().cross_entropy(x.data(), (int64_t)x.shape(0), refs, tangents, w, labels.data(),
                            softcap, exact, nll.data());
}

void rms_norm(Matrix x, Vector weight, float eps, int64_t tangents, Out<float, 2> y) {
    require_tangents(x.shape(0), tangents);
    require(weight.shape(0) == x.shape(1) && y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1),
            "x and y are [rows, d], weight is [d]");
    nb::gil_scoped_release release_gil;
    kernels().rms_norm(x.data(), (int64_t)x.shape(0), (int64_t)x.shape(1), weight.data(), eps,
                       tangents, y.data());
}

void layer_norm(Matrix x, Vector weight, Vector bias, float eps, int64_t tangents,
                Out<float, 2> y) {
    require_tangents(x.shape(0), tangents);
    require(weight.shape(0) == x.shape(1) && bias.shape(0) == x.shape(1) &&
                y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1),
            "x and y are [rows, d], weight and bias are [d]");
    nb::gil_scoped_release release_gil;
    kernels().layer_norm(x.data(), (int64_t)x.shape(0), (int64_t)x.shape(1), weight.data(),
                         bias.data(), eps, tangents, y.data());
}

void rope(Matrix x, In<int32_t, 1> positions, Matrix cos, Matrix sin, int64_t head_dim,
          bool interleaved, Out<float, 2> y) {
    const int64_t half = (int64_t)cos.shape(1), width = (int64_t)x.shape(1);
    require(head_dim > 0 && width % head_dim == 0 && 2 * half <= head_dim,
            "rows are not whole heads");
    require(sin.shape(0) == cos.shape(0) && sin.shape(1) == cos.shape(1),
            "cos and sin differ in shape");
    require(
        positions.shape(0) == x.shape(0) && y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1),
        "one position a row");
    for (size_t i = 0; i < positions.shape(0); ++i)
        require(positions.data()[i] >= 0 && positions.data()[i] < (int64_t)cos.shape(0),
                "a position is outside the table");
    nb::gil_scoped_release release_gil;
    kernels().rope(x.data(), (int64_t)x.shape(0), width, head_dim, half, positions.data(),
                   cos.data(), sin.data(), interleaved, y.data());
}

void swiglu(Matrix gate, Matrix up, int64_t tangents, Out<float, 2> y) {
    require_tangents(gate.shape(0), tangents);
    require(gate.size() == up.size() && gate.size() == y.size(), "gate, up and y differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().swiglu(gate.data(), up.data(), (int64_t)gate.size(), tangents, y.data());
}

void geglu(Matrix gate, Matrix up, int64_t tangents, Out<float, 2> y) {
    require_tangents(gate.shape(0), tangents);
    require(gate.size() == up.size() && gate.size() == y.size(), "gate, up and y differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().geglu(gate.data(), up.data(), (int64_t)gate.size(), tangents, y.data());
}

void gelu(Matrix x, int64_t tangents, Out<float, 2> y) {
    require_tangents(x.shape(0), tangents);
    require(x.size() == y.size(), "x and y differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().gelu(x.data(), (int64_t)x.size(), tangents, y.data());
}

struct AttentionShape {
    int64_t n_seq, n_heads, n_kv;
};

AttentionShape attention_shape(const Matrix& q, const Matrix& k, const Matrix& v,
                               const In<int32_t, 1>& starts, int64_t head_dim) {
    const int64_t rows = (int64_t)q.shape(0), n_seq = (int64_t)starts.shape(0) - 1;
    require(head_dim > 0 && q.shape(1) % head_dim == 0 && k.shape(1) % head_dim == 0,
            "rows are not whole heads");
    const int64_t n_heads = (int64_t)q.shape(1) / head_dim, n_kv = (int64_t)k.shape(1) / head_dim;
    require(n_kv > 0 && n_heads % n_kv == 0, "query heads are not a multiple of key/value heads");
    require((int64_t)k.shape(0) == rows && (int64_t)v.shape(0) == rows && v.shape(1) == k.shape(1),
            "q, k and v differ in shape");
    require(n_seq >= 0 && starts.data()[0] == 0 && starts.data()[n_seq] == rows,
            "starts run from 0 to the number of rows");
    for (int64_t s = 0; s < n_seq; ++s)
        require(starts.data()[s] < starts.data()[s + 1], "starts do not ascend");
    return {n_seq, n_heads, n_kv};
}

void require_window(int64_t window) { require(window >= 0, "a window is of 1 row or more"); }

void attention(Matrix q, Matrix k, Matrix v, In<int32_t, 1> starts, int64_t head_dim, float scale,
               bool causal, int64_t window, float softcap, int64_t tangents, Out<float, 2> y) {
    require_window(window);
    require_softcap(softcap);
    const auto [n_seq, n_heads, n_kv] = attention_shape(q, k, v, starts, head_dim);
    require(y.shape(0) == q.shape(0) && y.shape(1) == q.shape(1), "q and y differ in shape");
    require(tangents >= 0 && n_seq % (1 + tangents) == 0, "tangents have other sequences");
    const int64_t n_primal = n_seq / (1 + tangents);
    const int64_t primal = (int64_t)q.shape(0) / (1 + tangents);
    for (int64_t s = 0; s + n_primal <= n_seq; ++s)
        require(starts.data()[s] + primal == starts.data()[s + n_primal],
                "tangents have other sequences");
    nb::gil_scoped_release release_gil;
    kernels().attention(q.data(), k.data(), v.data(), starts.data(), n_seq, n_heads, n_kv, head_dim,
                        scale, causal, window, softcap, tangents, y.data());
}

// Cotangents: of outputs, dy, to those of inputs. What a cotangent is of has its shape.

template <typename A, typename B>
void require_alike(const A& a, const B& b, const char* what) {
    require(a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1), what);
}

void matmul_vjp(Matrix dy, const WeightArgument& weight, const LoraArgument* lora, bool exact,
                Out<float, 2> dx) {
    const Weight& w = weight.weight;
    require((int64_t)dy.shape(1) == w.n_out, "dy is [rows, n_out]");
    require(dx.shape(0) == dy.shape(0) && (int64_t)dx.shape(1) == w.n_in, "dx is [rows, n_in]");
    LoRA term{};
    if (lora) term = lora->of(w.n_in, w.n_out);
    nb::gil_scoped_release release_gil;
    kernels().matmul_vjp(dy.data(), (int64_t)dy.shape(0), w, lora ? &term : nullptr, exact,
                         dx.data());
}

void lora_vjp(Matrix x, Matrix dy, const LoraArgument& lora, Out<float, 2> da, Out<float, 2> db) {
    require(x.shape(0) == dy.shape(0), "x and dy differ in rows");
    const int64_t n_in = (int64_t)x.shape(1), n_out = (int64_t)dy.shape(1);
    const LoRA term = lora.of(n_in, n_out);
    require_alike(da, lora.a.values, "da is [rank, n_in]");
    require_alike(db, lora.b.values, "db is [n_out, rank]");
    nb::gil_scoped_release release_gil;
    kernels().lora_vjp(x.data(), dy.data(), (int64_t)x.shape(0), n_in, n_out, term, da.data(),
                       db.data());
}

void cross_entropy_vjp(Matrix x, const WeightArgument& weight, In<int32_t, 1> labels, float softcap,
                       bool exact, Out<double, 1> nll, Out<float, 2> dx) {
    require_softcap(softcap);
    const Weight& w = weight.weight;
    require((int64_t)x.shape(1) == w.n_in, "x is [rows, n_in]");
    require_alike(x, dx, "x and dx differ in shape");
    require(labels.shape(0) == x.shape(0) && nll.shape(0) == x.shape(0),
            "one label and result a row");
    for (size_t i = 0; i < labels.shape(0); ++i)
        require(labels.data()[i] >= 0 && labels.data()[i] < w.n_out,
                "a label is outside the vocabulary");
    nb::gil_scoped_release release_gil;
    kernels().cross_entropy_vjp(x.data(), (int64_t)x.shape(0), w, labels.data(), softcap, exact,
                                nll.data(), dx.data());
}

void rms_norm_vjp(Matrix x, Vector weight, float eps, Matrix dy, Out<float, 2> dx) {
    require(weight.shape(0) == x.shape(1), "x is [rows, d], weight is [d]");
    require_alike(x, dy, "x and dy differ in shape");
    require_alike(x, dx, "x and dx differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().rms_norm_vjp(x.data(), dy.data(), (int64_t)x.shape(0), (int64_t)x.shape(1),
                           weight.data(), eps, dx.data());
}

void layer_norm_vjp(Matrix x, Vector weight, float eps, Matrix dy, Out<float, 2> dx) {
    require(weight.shape(0) == x.shape(1), "x is [rows, d], weight is [d]");
    require_alike(x, dy, "x and dy differ in shape");
    require_alike(x, dx, "x and dx differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().layer_norm_vjp(x.data(), dy.data(), (int64_t)x.shape(0), (int64_t)x.shape(1),
                             weight.data(), eps, dx.data());
}

void require_gated_vjp(const Matrix& gate, const Matrix& up, const Matrix& dy,
                       const Out<float, 2>& dgate, const Out<float, 2>& dup) {
    require_alike(gate, up, "gate and up differ in shape");
    require_alike(gate, dy, "gate and dy differ in shape");
    require_alike(gate, dgate, "gate and dgate differ in shape");
    require_alike(gate, dup, "gate and dup differ in shape");
}

void swiglu_vjp(Matrix gate, Matrix up, Matrix dy, Out<float, 2> dgate, Out<float, 2> dup) {
    require_gated_vjp(gate, up, dy, dgate, dup);
    nb::gil_scoped_release release_gil;
    kernels().swiglu_vjp(gate.data(), up.data(), dy.data(), (int64_t)gate.size(), dgate.data(),
                         dup.data());
}

void geglu_vjp(Matrix gate, Matrix up, Matrix dy, Out<float, 2> dgate, Out<float, 2> dup) {
    require_gated_vjp(gate, up, dy, dgate, dup);
    nb::gil_scoped_release release_gil;
    kernels().geglu_vjp(gate.data(), up.data(), dy.data(), (int64_t)gate.size(), dgate.data(),
                        dup.data());
}

void gelu_vjp(Matrix x, Matrix dy, Out<float, 2> dx) {
    require_alike(x, dy, "x and dy differ in shape");
    require_alike(x, dx, "x and dx differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().gelu_vjp(x.data(), dy.data(), (int64_t)x.size(), dx.data());
}

void attention_vjp(Matrix q, Matrix k, Matrix v, In<int32_t, 1> starts, int64_t head_dim,
                   float scale, bool causal, int64_t window, float softcap, Matrix dy,
                   Out<float, 2> dq, Out<float, 2> dk, Out<float, 2> dv) {
    require_window(window);
    require_softcap(softcap);
    const AttentionShape shape = attention_shape(q, k, v, starts, head_dim);
    require_alike(q, dy, "q and dy differ in shape");
    require_alike(q, dq, "q and dq differ in shape");
    require_alike(k, dk, "k and dk differ in shape");
    require_alike(v, dv, "v and dv differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().attention_vjp(q.data(), k.data(), v.data(), dy.data(), starts.data(), shape.n_seq,
                            shape.n_heads, shape.n_kv, head_dim, scale, causal, window, softcap,
                            dq.data(), dk.data(), dv.data());
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("use_isa", &use_isa);
    m.def("product_seconds", &product_seconds, nb::call_guard<nb::gil_scoped_release>());
    m.attr("isas") = nb::tuple(nb::cast(isa_names()));
#if defined(__clang__)
    m.attr("compiler") = "Clang " __clang_version__;
#else
    m.attr("compiler") = "GCC " __VERSION__;
#endif
    m.def("peak", &peak);
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", [](int n) {
        require(n >= 1, "at least one thread");
        set_num_threads(n);
    });
    m.def("philox", &philox);
    m.def("random_values", &random_values);

    nb::class_<WeightArgument>(m, "Weight")
        .def(nb::init<Bytes, int, int64_t>(), "data"_a, "type"_a, "n_in"_a);
    // A factor's mask and basis are refused where they would have to be converted each time.
    nb::class_<FactorArgument>(m, "Factor")
        .def(nb::init<Matrix, uint64_t, std::optional<Vector>, std::optional<Matrix>>(), "values"_a,
             "offset"_a, "mask"_a.noconvert().none(), "basis"_a.noconvert().none());
    nb::class_<LoraArgument>(m, "LoRA").def(nb::init<FactorArgument, FactorArgument, float>(),
                                            "a"_a, "b"_a, "scale"_a);
    nb::class_<LanesArgument>(m, "Lanes")
        .def(nb::init<In<uint64_t, 2>, Vector, In<int32_t, 1>, std::string, bool>(), "seeds"_a,
             "coefficients"_a, "starts"_a, "distribution"_a, "tangents"_a);

    // What is changed in place is not converted: that would change a copy.
    m.def("seeded_axpy", &seeded_axpy, "theta"_a.noconvert(), "seeds"_a, "coefficients"_a,
          "offset"_a, "distribution"_a);
    m.def("seeded_dot", &seeded_dot, "g"_a, "seeds"_a, "offset"_a, "distribution"_a, "out"_a);
    m.def("gather", &gather, "weight"_a, "ids"_a, "out"_a);
    m.def("matmul", &matmul, "x"_a, "weight"_a, "bias"_a.none(), "lora"_a.none(), "lanes"_a,
          "references"_a, "exact"_a, "y"_a);
    m.def("add_lora", &add_lora, "x"_a, "lora"_a, "lanes"_a, "y"_a.noconvert());
    m.def("to_relative", &to_relative, "x"_a.noconvert(), "references"_a, "scales"_a.noconvert());
    m.def("from_relative", &from_relative, "y"_a.noconvert(), "references"_a, "scales"_a);
    m.def("cross_entropy", &cross_entropy, "x"_a, "weight"_a, "labels"_a, "references"_a,
          "tangents"_a, "softcap"_a, "exact"_a, "nll"_a);
    m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "tangents"_a, "y"_a);
    m.def("layer_norm", &layer_norm, "x"_a, "weight"_a, "bias"_a, "eps"_a, "tangents"_a, "y"_a);
    m.def("rope", &rope, "x"_a, "positions"_a, "cos"_a, "sin"_a, "head_dim"_a, "interleaved"_a,
          "y"_a);
    m.def("swiglu", &swiglu, "gate"_a, "up"_a, "tangents"_a, "y"_a);
    m.def("geglu", &geglu, "gate"_a, "up"_a, "tangents"_a, "y"_a);
    m.def("gelu", &gelu, "x"_a, "tangents"_a, "y"_a);
    m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "starts"_a, "head_dim"_a, "scale"_a,
          "causal"_a, "window"_a, "softcap"_a, "tangents"_a, "y"_a);

    m.def("matmul_vjp", &matmul_vjp, "dy"_a, "weight"_a, "lora"_a.none(), "exact"_a, "dx"_a);
    m.def("lora_vjp", &lora_vjp, "x"_a, "dy"_a, "lora"_a, "da"_a.noconvert(), "db"_a.noconvert());
    m.def("cross_entropy_vjp", &cross_entropy_vjp, "x"_a, "weight"_a, "labels"_a, "softcap"_a,
          "exact"_a, "nll"_a, "dx"_a);
    m.def("rms_norm_vjp", &rms_norm_vjp, "x"_a, "weight"_a, "eps"_a, "dy"_a, "dx"_a);
    m.def("layer_norm_vjp", &layer_norm_vjp, "x"_a, "weight"_a, "eps"_a, "dy"_a, "dx"_a);
    m.def("swiglu_vjp", &swiglu_vjp, "gate"_a, "up"_a, "dy"_a, "dgate"_a, "dup"_a);
    m.def("geglu_vjp", &geglu_vjp, "gate"_a, "up"_a, "dy"_a, "dgate"_a, "dup"_a);
    m.def("gelu_vjp", &gelu_vjp, "x"_a, "dy"_a, "dx"_a);
    m.def("attention_vjp", &attention_vjp, "q"_a, "k"_a, "v"_a, "starts"_a, "head_dim"_a, "scale"_a,
          "causal"_a, "window"_a, "softcap"_a, "dy"_a, "dq"_a, "dk"_a, "dv"_a);
}

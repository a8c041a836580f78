// The challenge's network on a few images at a time, forward and backward.
//
// Called from ddkit/network/winograd.py, which says why all of this computes the same numbers as the plain network. Plain
// C interface, no header of PyTorch or Python: compiled in seconds by any GCC or Clang. Compiled as it stands, all tensors
// are contiguous float32 unless a stride is passed. With -DBFLOAT16 the planes of transformed tiles, and whatever is a
// factor of a product, are bfloat16, and products are summed in float32: with the processor's own instructions where it
// has AVX512-BF16, unless -DPORTABLE forbids them.
//
// Every function handles one image and one block of BLOCK channels at a time, so that a block's whole feature map
// stays in the first or second level cache from the inverse transform through norm, ReLU and pooling to the next
// transform. Instance norm makes that possible: its statistics are of one image and one channel.

#include <cstring>
#include <initializer_list>
#if defined(BFLOAT16) && defined(__AVX512BF16__) && !defined(PORTABLE)
#define BFLOAT16_INSTRUCTIONS
#include <immintrin.h>
#endif

// A norm's parameters (128 each), its statistics (n, 2, 128: mean and inverse standard deviation), its gradients.
struct NormData {
    const float *weight, *bias;
    float *statistics, *weight_gradient, *bias_gradient;
};

namespace {

// Vectors as wide as the processor's registers; GCC and Clang turn their arithmetic into its instructions.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int CHANNELS = 128;
constexpr int BLOCK = 16;  // channels: one cache line of floats
constexpr int VECS = BLOCK / LANES;
constexpr int TAPS = 27;  // of the first convolution: 3 channels of 3 x 3
constexpr int COLUMN = 32;  // floats for TAPS of them, whole vectors
constexpr float EPSILON = 1e-5f;  // of torch.nn.GroupNorm

typedef float Vec __attribute__((vector_size(4 * LANES)));

inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// What a plane holds, and the words that products are made of: a float, or two bfloat16 whose products are added up.
#ifdef BFLOAT16
typedef unsigned short Stored;
typedef unsigned Word;
typedef unsigned Bits __attribute__((vector_size(4 * LANES)));
typedef unsigned short Halves __attribute__((vector_size(2 * LANES)));

inline Vec from_bits(Bits bits) { return (Vec)bits; }  // GCC's and Clang's casts of vectors keep the bits

// To the nearest bfloat16, ties to even: the upper half of a float's bits. What is no number stays none, as arithmetic
// makes only such of them whose lower half is zero.
inline Bits round_to_bfloat16(Vec value) {
    const Bits bits = (Bits)value;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

inline Bits widen(const Stored* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Bits);
}

inline Vec load(const Stored* from) { return from_bits(widen(from) << 16); }

inline void store(Stored* to, Vec value) {
#ifdef BFLOAT16_INSTRUCTIONS
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
#else
    const Halves halves = __builtin_convertvector(round_to_bfloat16(value) >> 16, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

// sum + the products of a word with LANES words.
inline Vec add_products(Vec sum, const void* factor, const Word* factors) {
    Word word;
    std::memcpy(&word, factor, sizeof word);
    Bits words;
    std::memcpy(&words, factors, sizeof words);
#ifdef BFLOAT16_INSTRUCTIONS
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(word), (__m512bh)words);
#else
    const Bits all = Bits{} + word;
    return sum + from_bits(all << 16) * from_bits(words << 16) +
           from_bits(all & 0xffff0000u) * from_bits(words & 0xffff0000u);
#endif
}
#else
typedef float Stored;
typedef float Word;

inline Vec add_products(Vec sum, const void* factor, const Word* factors) {
    Word word;
    std::memcpy(&word, factor, sizeof word);
    return sum + word * load(factors);
}
#endif
constexpr int PAIR = sizeof(Word) / sizeof(Stored);

inline void add(float* to, Vec value) { store(to, load(to) + value); }

inline Vec inverse_root(Vec value) {
    for (int lane = 0; lane < LANES; lane++) value[lane] = 1.0f / __builtin_sqrtf(value[lane]);
    return value;
}

inline long whole_lines(long floats) { return (floats + BLOCK - 1) / BLOCK * BLOCK; }

// ---- Winograd's F(4x4, 3x3) in one dimension (arXiv 1509.09308); two dimensions are rows, then columns. ----
// Interpolated at 0, +-P, +-Q and infinity, with P Q = 1: half the rounding error of the usual 0, +-1, +-2.

constexpr float P = 0.70710678118654752f;  // 1 / sqrt(2)
constexpr float Q = 1.41421356237309505f;  // sqrt(2)

// B^T d: 6 inputs of a tile -> 6 transformed.
inline void transform_input(const Vec* d, int step, Vec* v, int v_step) {
    const Vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    const Vec even_p = d4 - 2.0f * d2, odd_p = P * (d3 - 2.0f * d1);
    const Vec even_q = d4 - 0.5f * d2, odd_q = Q * (d3 - 0.5f * d1);
    v[0] = d0 - 2.5f * d2 + d4;
    v[v_step] = even_p + odd_p;
    v[2 * v_step] = even_p - odd_p;
    v[3 * v_step] = even_q + odd_q;
    v[4 * v_step] = even_q - odd_q;
    v[5 * v_step] = d1 - 2.5f * d3 + d5;
}

// B v: the transpose of transform_input, for gradients.
inline void transform_input_back(const Vec* v, int step, Vec* d, int d_step) {
    const Vec v0 = v[0], v5 = v[5 * step];
    const Vec even_p = v[step] + v[2 * step], odd_p = P * (v[step] - v[2 * step]);
    const Vec even_q = v[3 * step] + v[4 * step], odd_q = Q * (v[3 * step] - v[4 * step]);
    d[0] = v0;
    d[d_step] = v5 - 2.0f * odd_p - 0.5f * odd_q;
    d[2 * d_step] = -2.5f * v0 - 2.0f * even_p - 0.5f * even_q;
    d[3 * d_step] = odd_p + odd_q - 2.5f * v5;
    d[4 * d_step] = v0 + even_p + even_q;
    d[5 * d_step] = v5;
}

// A^T m: 6 products -> 4 outputs of a tile.
inline void transform_output(const Vec* m, int step, Vec* y, int y_step) {
    const Vec even_p = m[step] + m[2 * step], odd_p = P * (m[step] - m[2 * step]);
    const Vec even_q = m[3 * step] + m[4 * step], odd_q = Q * (m[3 * step] - m[4 * step]);
    y[0] = m[0] + even_p + even_q;
    y[y_step] = odd_p + odd_q;
    y[2 * y_step] = 0.5f * even_p + 2.0f * even_q;
    y[3 * y_step] = 0.5f * odd_p + 2.0f * odd_q + m[5 * step];
}

// A y: the transpose of transform_output, for gradients.
inline void transform_output_back(const Vec* y, int step, Vec* m, int m_step) {
    const Vec y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    const Vec even_p = y0 + 0.5f * y2, odd_p = P * (y1 + 0.5f * y3);
    const Vec even_q = y0 + 2.0f * y2, odd_q = Q * (y1 + 2.0f * y3);
    m[0] = y0;
    m[m_step] = even_p + odd_p;
    m[2 * m_step] = even_p - odd_p;
    m[3 * m_step] = even_q + odd_q;
    m[4 * m_step] = even_q - odd_q;
    m[5 * m_step] = y3;
}

// The 36 planes of transformed tiles: plane (i, j) of tile t, channel c lies at [(6 i + j) plane + 128 t + c].
struct Planes {
    Stored* data;
    long plane;  // values from one plane to the next; not a power of two, which would crowd few cache sets
    Stored* at(int index, long tile, int channel) const { return data + index * plane + tile * CHANNELS + channel; }
};

inline void store_tile(const Vec* tile, Planes to, long index, int channel) {
    for (int k = 0; k < 36; k++) store(to.at(k, index, channel), tile[k]);
}

// Calls f(place of the corner in lines of `row` floats, number of the tile, channel) for each tile of a side^2 map.
template <class F>
inline void for_each_tile(int side, int row, F f) {
    const int tiles = side / 4;
    for (int ty = 0; ty < tiles; ty++)
        for (int tx = 0; tx < tiles; tx++)
            for (int c = 0; c < BLOCK; c += LANES) f(4 * ty * row + 4 * tx * BLOCK + c, ty * tiles + tx, c);
}

inline void load_tile(Planes from, long index, int channel, Vec* tile) {
    for (int k = 0; k < 36; k++) tile[k] = load(from.at(k, index, channel));
}

// map: (side + 2)^2 pixels of BLOCK channels with a border of zeros -> the tiles of one image.
void map_to_tiles(const float* map, int side, Planes to, long first_tile, int channel) {
    const int row = (side + 2) * BLOCK;
    for_each_tile(side, row, [&](int corner, int number, int c) {
        Vec input[36], half[36], tile[36];
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 6; j++) input[6 * i + j] = load(map + corner + i * row + j * BLOCK);
        for (int j = 0; j < 6; j++) transform_input(input + j, 6, half + j, 6);
        for (int i = 0; i < 6; i++) transform_input(half + 6 * i, 1, tile + 6 * i, 1);
        store_tile(tile, to, first_tile + number, channel + c);
    });
}

// The transpose of map_to_tiles: gradients of an image's tiles -> gradient of its map; tiles overlap, so it adds.
void map_to_tiles_back(Planes from, long first_tile, int channel, int side, float* map) {
    const int row = (side + 2) * BLOCK;
    std::memset(map, 0, sizeof(float) * row * (side + 2));
    for_each_tile(side, row, [&](int corner, int number, int c) {
        Vec tile[36], half[36], input[36];
        load_tile(from, first_tile + number, channel + c, tile);
        for (int j = 0; j < 6; j++) transform_input_back(tile + j, 6, half + j, 6);
        for (int i = 0; i < 6; i++) transform_input_back(half + 6 * i, 1, input + 6 * i, 1);
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 6; j++) add(map + corner + i * row + j * BLOCK, input[6 * i + j]);
    });
}

// The products of one image's tiles -> the convolution's side^2 outputs of BLOCK channels.
void tiles_to_outputs(Planes from, long first_tile, int channel, int side, float* outputs) {
    const int row = side * BLOCK;
    for_each_tile(side, row, [&](int corner, int number, int c) {
        Vec tile[36], half[24], output[16];
        load_tile(from, first_tile + number, channel + c, tile);
        for (int j = 0; j < 6; j++) transform_output(tile + j, 6, half + j, 6);
        for (int i = 0; i < 4; i++) transform_output(half + 6 * i, 1, output + 4 * i, 1);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) store(outputs + corner + i * row + j * BLOCK, output[4 * i + j]);
    });
}

// The transpose of tiles_to_outputs.
void tiles_to_outputs_back(const float* outputs, int side, Planes to, long first_tile, int channel) {
    const int row = side * BLOCK;
    for_each_tile(side, row, [&](int corner, int number, int c) {
        Vec output[16], half[24], tile[36];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) output[4 * i + j] = load(outputs + corner + i * row + j * BLOCK);
        for (int j = 0; j < 4; j++) transform_output_back(output + j, 4, half + j, 4);
        for (int i = 0; i < 6; i++) transform_output_back(half + 4 * i, 1, tile + 6 * i, 1);
        store_tile(tile, to, first_tile + number, channel + c);
    });
}

// ---- Products of matrices of words. ----

// Rows and vectors of sums at a time: enough to keep the multipliers busy, few enough to stay in registers.
constexpr int ROWS = LANES == 16 ? 8 : 4;
constexpr int COLUMNS = 2 * LANES;

// sums[r][v] += over k of a[r row + k next] * b[k b_next + v LANES ...]; in words.
template <int R, int V>
inline void add_up(const Word* a, long row, long next, const Word* b, long b_next, int steps, Vec (&sums)[R][V]) {
    for (int k = 0; k < steps; k++, a += next, b += b_next)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] = add_products(sums[r][v], a + r * row, b + v * LANES);
}

// (R, 128) values times a panel of weights, (128 / PAIR, COLUMNS) words -> R rows of COLUMNS values in `to`.
template <int R>
inline void multiply_rows(const Stored* from, const Word* panel, Stored* to) {
    constexpr int WORDS = CHANNELS / PAIR;
    Vec sums[R][2] = {};
    add_up(reinterpret_cast<const Word*>(from), WORDS, 1, panel, COLUMNS, WORDS, sums);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) store(to + r * CHANNELS + v * LANES, sums[r][v]);
}

#ifdef BFLOAT16
// `count` rows of 128 values -> panels of words, (128 / COLUMNS, ceil(count / PAIR), COLUMNS): each word a value and the
// one below it.
void pack_rows(const Stored* from, int count, Word* to) {
    for (int c = 0; c < CHANNELS; c += COLUMNS)
        for (int row = 0; row < count; row += PAIR, to += COLUMNS)
            for (int vec = 0; vec < COLUMNS; vec += LANES) {
                const Stored* value = from + row * CHANNELS + c + vec;
                const Bits words = widen(value) | (row + 1 < count ? widen(value + CHANNELS) << 16 : Bits{});
                std::memcpy(to + vec, &words, sizeof words);
            }
}
#endif

// ---- Instance norm, ReLU and 2x2 average pooling of one block of channels of one image. ----

struct Norm {
    Vec mean[VECS], inverse_std[VECS], scale[VECS], shift[VECS];

    Norm(const NormData& data, long image, int first_channel) {
        for (int vec = 0; vec < VECS; vec++) {
            const int c = first_channel + vec * LANES;
            mean[vec] = load(data.statistics + image * 2 * CHANNELS + c);
            inverse_std[vec] = load(data.statistics + image * 2 * CHANNELS + CHANNELS + c);
            scale[vec] = inverse_std[vec] * load(data.weight + c);
            shift[vec] = load(data.bias + c) - mean[vec] * scale[vec];
        }
    }

    // The value before the ReLU. Forward and backward must agree on its sign to the last bit.
    Vec operator()(const float* value, int vec) const { return load(value + vec * LANES) * scale[vec] + shift[vec]; }
};

// Adds up f(pixel, vec) over side^2 pixels: row by row, for precision, and even and odd pixels apart, for speed.
template <int COUNT, class F>
inline void sum_over_pixels(int side, Vec (&total)[COUNT], F f) {
    for (int y = 0; y < side; y++) {
        Vec sums[2][COUNT] = {};
        for (int x = 0; x < side; x += 2)
            for (int p = 0; p < 2; p++) f(y, x + p, sums[p]);
        for (int k = 0; k < COUNT; k++) total[k] += sums[0][k] + sums[1][k];
    }
}

// Mean and 1 / sqrt(variance + eps) of side^2 values a channel, in two passes as that is precise.
void statistics(const float* values, int side, float* mean, float* inverse_std) {
    const float pixels = float(side) * float(side);
    Vec sum[VECS] = {}, squares[VECS] = {}, center[VECS];
    sum_over_pixels(side, sum, [&](int y, int x, Vec* sums) {
        for (int vec = 0; vec < VECS; vec++) sums[vec] += load(values + (y * side + x) * BLOCK + vec * LANES);
    });
    for (int vec = 0; vec < VECS; vec++) center[vec] = sum[vec] / pixels;
    sum_over_pixels(side, squares, [&](int y, int x, Vec* sums) {
        for (int vec = 0; vec < VECS; vec++) {
            const Vec difference = load(values + (y * side + x) * BLOCK + vec * LANES) - center[vec];
            sums[vec] += difference * difference;
        }
    });
    for (int vec = 0; vec < VECS; vec++) {
        store(mean + vec * LANES, center[vec]);
        store(inverse_std + vec * LANES, inverse_root(squares[vec] / pixels + EPSILON));
    }
}

// values: side^2 x BLOCK of an image, from channel c on -> their statistics in `data`, and pooled: (side / 2 + 2)^2 x
// BLOCK, inside a border of zeros that the caller has set.
void normalize_and_pool(const float* values, int side, const NormData& data, long image, int c, float* pooled) {
    float* mean = data.statistics + image * 2 * CHANNELS + c;
    statistics(values, side, mean, mean + CHANNELS);
    const Norm norm(data, image, c);
    const int half = side / 2, row = side * BLOCK, pooled_row = (half + 2) * BLOCK;
    for (int y = 0; y < half; y++)
        for (int x = 0; x < half; x++)
            for (int vec = 0; vec < VECS; vec++) {
                const float* corner = values + 2 * y * row + 2 * x * BLOCK;
                Vec sum = {};
                for (const float* value : {corner, corner + BLOCK, corner + row, corner + row + BLOCK}) {
                    const Vec before = norm(value, vec);
                    sum += before < 0 ? Vec{} : before;  // this way round, what is no number stays none
                }
                store(pooled + (y + 1) * pooled_row + (x + 1) * BLOCK + vec * LANES, sum * 0.25f);
            }
}

// pooled_gradient: (side / 2 + 2)^2 x BLOCK, its border ignored. Replaces `values` by their own gradients and adds
// the gradients of the norm's weight and bias to those in `data`.
void normalize_and_pool_back(
    float* values, int side, const NormData& data, long image, int c, const float* pooled_gradient
) {
    const Norm norm(data, image, c);
    const int pooled_row = (side / 2 + 2) * BLOCK;
    const float pixels = float(side) * float(side);
    // Of the value before the ReLU.
    const auto gradient_at = [&](int y, int x, int vec) {
        const Vec pooled = load(pooled_gradient + (y / 2 + 1) * pooled_row + (x / 2 + 1) * BLOCK + vec * LANES);
        return norm(values + (y * side + x) * BLOCK, vec) > 0 ? pooled * 0.25f : Vec{};
    };
    const auto centered_at = [&](int y, int x, int vec) {
        return load(values + (y * side + x) * BLOCK + vec * LANES) - norm.mean[vec];
    };
    Vec sums[2 * VECS] = {};  // of the gradients, and of their products with the centered values
    sum_over_pixels(side, sums, [&](int y, int x, Vec* into) {
        for (int vec = 0; vec < VECS; vec++) {
            const Vec gradient = gradient_at(y, x, vec);
            into[vec] += gradient;
            into[VECS + vec] += gradient * centered_at(y, x, vec);
        }
    });
    Vec mean_gradient[VECS], slope[VECS];
    for (int vec = 0; vec < VECS; vec++) {
        const Vec of_weight = sums[VECS + vec] * norm.inverse_std[vec];
        add(data.weight_gradient + c + vec * LANES, of_weight);
        add(data.bias_gradient + c + vec * LANES, sums[vec]);
        mean_gradient[vec] = sums[vec] / pixels;
        slope[vec] = of_weight * norm.inverse_std[vec] / pixels;
    }
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++)
            for (int vec = 0; vec < VECS; vec++) {
                const Vec change = gradient_at(y, x, vec) - mean_gradient[vec] - centered_at(y, x, vec) * slope[vec];
                store(values + (y * side + x) * BLOCK + vec * LANES, norm.scale[vec] * change);
            }
}

// ---- The first convolution, from 3 channels: direct. ----

#ifdef BFLOAT16
constexpr int STEPS = (TAPS + 1) / 2;

inline Stored nearest(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// Where tap `tap` of the output in the corner lies in a padded image of lines of `row` pixels.
inline long tap_place(int tap, int row) { return long(tap / 9 * row + tap / 3 % 3) * row + tap % 3; }

inline long padded_floats(int side) { return whole_lines((3L * (side + 2) * (side + 2) + 2) / 2); }

// What an image takes of scratch memory: itself in bfloat16 with a border, and the words of all its pixels' taps.
inline long image_floats(int side) { return padded_floats(side) + STEPS * long(side) * side; }

inline const Stored* pixels_of(const float* padded) { return reinterpret_cast<const Stored*>(padded); }

inline Word* words_of(float* padded, int side) { return reinterpret_cast<Word*>(padded + padded_floats(side)); }

// image: (3, side, side) -> padded: (3, side + 2, side + 2) bfloat16 inside a border of zeros, and after it
// (STEPS, side^2) words, each two taps of an output.
void pad_image(const float* image, int side, float* padded) {
    const int row = side + 2;
    Stored* pixels = reinterpret_cast<Stored*>(padded);
    std::memset(padded, 0, sizeof(float) * padded_floats(side));
    for (int channel = 0; channel < 3; channel++)
        for (int y = 0; y < side; y++)
            for (int x = 0; x < side; x++) pixels[(channel * row + y + 1) * row + x + 1] = nearest(*image++);
    Word* words = words_of(padded, side);
    for (int step = 0; step < STEPS; step++)
        for (int y = 0; y < side; y++) {
            const Stored* first = pixels + tap_place(2 * step, row) + y * row;
            // The last word is of one tap: what stands in its other half meets a weight of zero.
            const Stored* second = 2 * step + 1 < TAPS ? pixels + tap_place(2 * step + 1, row) + y * row : first;
            for (int x = 0; x < side; x++) *words++ = first[x] | Word(second[x]) << 16;
        }
}

// weight: (STEPS, 128) words, from the block's first channel on -> outputs: side^2 x BLOCK.
void convolve_image(float* padded, int side, const Word* weight, float* outputs) {
    constexpr int PIXELS = 16 / VECS;
    const Word* words = words_of(padded, side);
    for (int pixel = 0; pixel < side * side; pixel += PIXELS) {
        Vec sums[PIXELS][VECS] = {};
        add_up(words + pixel, 1, side * side, weight, CHANNELS, STEPS, sums);
        for (int p = 0; p < PIXELS; p++)
            for (int vec = 0; vec < VECS; vec++) store(outputs + (pixel + p) * BLOCK + vec * LANES, sums[p][vec]);
    }
}

// gradients: side^2 x BLOCK, of the outputs, overwritten; adds to weight_gradient: (27, 128), from the block's first
// channel on.
void convolve_image_back(float* padded, int side, float* gradients, float* weight_gradient) {
    const int row = side + 2;
    // Words of the gradients of two pixels side by side: they meet words of two pixels of the image.
    Word* words = reinterpret_cast<Word*>(gradients);
    for (int pixel = 0; pixel < side * side; pixel += 2)
        for (int vec = 0; vec < VECS; vec++) {
            const float* from = gradients + pixel * BLOCK + vec * LANES;
            const Bits pair = round_to_bfloat16(load(from)) >> 16 | round_to_bfloat16(load(from + BLOCK));
            std::memcpy(words + pixel / 2 * BLOCK + vec * LANES, &pair, sizeof pair);
        }
    for (int channel = 0; channel < 3; channel++) {
        Vec sums[9][VECS] = {};
        for (int y = 0; y < side; y++) {
            const Stored* pixel = pixels_of(padded) + tap_place(9 * channel, row) + y * row;
            for (int x = 0; x < side; x += 2)
                for (int tap = 0; tap < 9; tap++)
                    for (int vec = 0; vec < VECS; vec++)
                        sums[tap][vec] = add_products(
                            sums[tap][vec], pixel + tap / 3 * row + x + tap % 3,
                            words + (y * side + x) / 2 * BLOCK + vec * LANES
                        );
        }
        for (int tap = 0; tap < 9; tap++)
            for (int vec = 0; vec < VECS; vec++)
                add(weight_gradient + (9 * channel + tap) * CHANNELS + vec * LANES, sums[tap][vec]);
    }
}

// gradients: side^2 x BLOCK, of the outputs, overwritten; adds to columns: (side^2, COLUMN), what each output's taps pass
// back. weight_rows: (64, COLUMN) words of two channels' taps each, from the block's first on.
void convolve_image_to_columns(float* gradients, int side, const Word* weight_rows, float* columns) {
    constexpr int PIXELS = 4, VECS_OF_COLUMN = COLUMN / LANES, WORDS = BLOCK / 2;
    Stored* halves = reinterpret_cast<Stored*>(gradients);
    for (int place = 0; place < side * side * BLOCK; place += LANES) store(halves + place, load(gradients + place));
    const Word* words = reinterpret_cast<const Word*>(halves);
    for (int pixel = 0; pixel < side * side; pixel += PIXELS, columns += PIXELS * COLUMN)
        for (int half = 0; half < VECS_OF_COLUMN; half += 2) {
            Vec sums[PIXELS][2];
            float* to = columns + half * LANES;
            for (int p = 0; p < PIXELS; p++)
                for (int vec = 0; vec < 2; vec++) sums[p][vec] = load(to + p * COLUMN + vec * LANES);
            add_up(words + pixel * WORDS, WORDS, 1, weight_rows + half * LANES, COLUMN, WORDS, sums);
            for (int p = 0; p < PIXELS; p++)
                for (int vec = 0; vec < 2; vec++) store(to + p * COLUMN + vec * LANES, sums[p][vec]);
        }
}
#else
inline long image_floats(int side) { return whole_lines(3L * (side + 2) * (side + 2)); }

// image: (3, side, side) -> padded: (3, side + 2, side + 2) inside a border of zeros.
void pad_image(const float* image, int side, float* padded) {
    const int row = side + 2;
    std::memset(padded, 0, sizeof(float) * 3 * row * row);
    for (int channel = 0; channel < 3; channel++)
        for (int y = 0; y < side; y++)
            std::memcpy(
                padded + (channel * row + y + 1) * row + 1, image + (channel * side + y) * side, sizeof(float) * side
            );
}

// weight: (27, 128), from the block's first channel on -> outputs: side^2 x BLOCK.
void convolve_image(const float* padded, int side, const float* weight, float* outputs) {
    // Pixels at a time: enough sums to keep the multipliers busy, few enough to stay in registers.
    constexpr int PIXELS = 8 / VECS;
    const int row = side + 2;
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x += PIXELS) {
            Vec sums[PIXELS][VECS] = {};
            for (int line = 0; line < 9; line++) {  // of three taps side by side
                const float* pixel = padded + (line / 3 * row + y + line % 3) * row + x;
                const float* taps = weight + 3 * line * CHANNELS;
                for (int k = 0; k < 3; k++)
                    for (int vec = 0; vec < VECS; vec++) {
                        const Vec w = load(taps + k * CHANNELS + vec * LANES);
                        for (int p = 0; p < PIXELS; p++) sums[p][vec] += w * pixel[p + k];
                    }
            }
            for (int p = 0; p < PIXELS; p++)
                for (int vec = 0; vec < VECS; vec++)
                    store(outputs + (y * side + x + p) * BLOCK + vec * LANES, sums[p][vec]);
        }
}

// gradients: side^2 x BLOCK, of the outputs; adds to weight_gradient: (27, 128), from the block's first channel on.
void convolve_image_back(const float* padded, int side, const float* gradients, float* weight_gradient) {
    const int row = side + 2;
    for (int y = 0; y < side; y++)
        for (int channel = 0; channel < 3; channel++) {
            const float* corner = padded + (channel * row + y) * row;
            const float* from = gradients + y * side * BLOCK;
            // Nine taps, so that a pixel that is loaded meets all of them, and even and odd pixels apart: enough sums to keep
            // the multipliers busy.
            Vec sums[9][2][VECS] = {};
            for (int x = 0; x < side; x += 2)
                for (int vec = 0; vec < VECS; vec++) {
                    const Vec even = load(from + x * BLOCK + vec * LANES), odd = load(from + (x + 1) * BLOCK + vec * LANES);
                    for (int tap = 0; tap < 9; tap++) {
                        const float* pixel = corner + tap / 3 * row + x + tap % 3;
                        sums[tap][0][vec] += even * pixel[0];
                        sums[tap][1][vec] += odd * pixel[1];
                    }
                }
            for (int tap = 0; tap < 9; tap++)
                for (int vec = 0; vec < VECS; vec++)
                    add(weight_gradient + (9 * channel + tap) * CHANNELS + vec * LANES, sums[tap][0][vec] + sums[tap][1][vec]);
        }
}

// gradients: side^2 x BLOCK, of the outputs; adds to columns: (side^2, COLUMN), what each output's taps pass back.
// weight_rows: (128, COLUMN), the taps of each channel side by side and zeros after them, from the block's first on.
void convolve_image_to_columns(const float* gradients, int side, const float* weight_rows, float* columns) {
    constexpr int VECS_OF_COLUMN = COLUMN / LANES;
    for (int pixel = 0; pixel < side * side; pixel++, gradients += BLOCK, columns += COLUMN) {
        Vec sums[VECS_OF_COLUMN];
        for (int vec = 0; vec < VECS_OF_COLUMN; vec++) sums[vec] = load(columns + vec * LANES);
        for (int channel = 0; channel < BLOCK; channel++)
            for (int vec = 0; vec < VECS_OF_COLUMN; vec++)
                sums[vec] += gradients[channel] * load(weight_rows + channel * COLUMN + vec * LANES);
        for (int vec = 0; vec < VECS_OF_COLUMN; vec++) store(columns + vec * LANES, sums[vec]);
    }
}

#endif

// Scratch memory for images of `side` pixels: an image with its border, and a block's values and pooled values.
struct Scratch {
    float *padded, *values, *pooled;
    Scratch(float* memory, int side) : padded(memory), values(padded + image_floats(side)), pooled(values + side * side * BLOCK) {}
};

// Calls f(number of the image, first channel, the block's values) for each block of values: (n, 8, side^2, 16).
template <class F>
inline void for_each_block(int n, int side, float* values, F f) {
    for (long image = 0; image < n; image++)
        for (int c = 0; c < CHANNELS; c += BLOCK, values += side * side * BLOCK) f(image, c, values);
}

// Calls f(place) for each value inside the border of a pooled block: channel by channel, as embeddings are ordered.
template <class F>
inline void for_each_pooled(int half, F f) {
    for (int channel = 0; channel < BLOCK; channel++)
        for (int y = 0; y < half; y++)
            for (int x = 0; x < half; x++) f(((y + 1) * (half + 2) + x + 1) * BLOCK + channel);
}

// columns: (side^2, COLUMN) -> the gradient of the image (3, side, side), by way of one with a border in `padded`.
void columns_to_image(const float* columns, int side, float* padded, float* image) {
    const int row = side + 2;
    std::memset(padded, 0, sizeof(float) * 3 * row * row);
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++, columns += COLUMN)
            for (int line = 0; line < 9; line++)
                for (int k = 0; k < 3; k++)
                    padded[(line / 3 * row + y + line % 3) * row + x + k] += columns[3 * line + k];
    for (int channel = 0; channel < 3; channel++)
        for (int y = 0; y < side; y++)
            std::memcpy(
                image + (channel * side + y) * side, padded + (channel * row + y + 1) * row + 1, sizeof(float) * side
            );
}

}  // namespace

extern "C" {

// Floats of scratch memory that each function below needs for images of `side` pixels; to be aligned as a cache line.
long scratch_floats(int side) {
    const long half = side / 2 + 2;
    return image_floats(side) + long(side) * side * BLOCK + half * half * BLOCK;
}

// Columns of a panel of weights.
int panel_columns() { return COLUMNS; }

// (36, tiles, 128) times (36, 128, 128) in panels; from and to: planes, equally far apart.
void multiply(const Stored* from, Stored* to, long plane, long tiles, const Word* weights) {
    constexpr long GROUP = 128;  // tiles that meet a panel while it lies in the first level cache
    for (int k = 0; k < 36; k++, from += plane, to += plane)
        for (long first = 0; first < tiles; first += GROUP) {
            const long end = first + GROUP < tiles ? first + GROUP : tiles;
            const Word* panel = weights + k * CHANNELS * CHANNELS / PAIR;
            for (int c = 0; c < CHANNELS; c += COLUMNS, panel += COLUMNS * CHANNELS / PAIR) {
                long tile = first;
                for (; tile + ROWS <= end; tile += ROWS)
                    multiply_rows<ROWS>(from + tile * CHANNELS, panel, to + tile * CHANNELS + c);
                for (; tile < end; tile++)
                    multiply_rows<1>(from + tile * CHANNELS, panel, to + tile * CHANNELS + c);
            }
        }
}

// Adds the products of (36, 128, tiles) with (36, tiles, 128), both as planes of tiles, to gradient: (36, 128, 128).
void multiply_to_weights(const Stored* inputs, const Stored* gradients, long plane, long tiles, float* gradient) {
    constexpr int TILES = 128;  // at a time
    constexpr int NEXT = PAIR == 1 ? CHANNELS : COLUMNS;  // words from one row to the next
    for (int k = 0; k < 36; k++, inputs += plane, gradients += plane, gradient += CHANNELS * CHANNELS)
        for (long tile = 0; tile < tiles; tile += TILES) {
            const int count = tiles - tile < TILES ? tiles - tile : TILES, steps = (count + PAIR - 1) / PAIR;
#ifdef BFLOAT16
            alignas(64) Word left[TILES / PAIR * CHANNELS], right[TILES / PAIR * CHANNELS];
            pack_rows(inputs + tile * CHANNELS, count, left);
            pack_rows(gradients + tile * CHANNELS, count, right);
            const auto column = [&](int c) { return c / COLUMNS * COLUMNS * steps + c % COLUMNS; };
#else
            const Word *left = inputs + tile * CHANNELS, *right = gradients + tile * CHANNELS;
            const auto column = [](int c) { return c; };
#endif
            for (int c = 0; c < CHANNELS; c += COLUMNS)
                for (int i = 0; i < CHANNELS; i += ROWS) {
                    // The sums so far come from beyond the second level cache; they are fetched in the meantime.
                    for (int r = 0; r < ROWS; r++)
                        for (int v = 0; v < 2; v++)
                            __builtin_prefetch(gradient + (i + r) * CHANNELS + c + v * LANES, 1);
                    Vec sums[ROWS][2] = {};
                    add_up(left + column(i), 1, NEXT, right + column(c), NEXT, steps, sums);
                    for (int r = 0; r < ROWS; r++)
                        for (int v = 0; v < 2; v++) add(gradient + (i + r) * CHANNELS + c + v * LANES, sums[r][v]);
                }
        }
}

// Block 1, and the input transform of block 2. images: (n, 3, side, side), weight: (27, 128), of bfloat16 (14, 128) words.
void first_forward(
    const float* images, int n, int side, const Word* weight, NormData norm, Stored* planes, long plane, float* memory
) {
    const int half = side / 2;
    const long tiles = long(half / 4) * (half / 4);
    const Scratch scratch(memory, side);
    std::memset(scratch.pooled, 0, sizeof(float) * (half + 2) * (half + 2) * BLOCK);
    for (long image = 0; image < n; image++) {
        pad_image(images + image * 3 * side * side, side, scratch.padded);
        for (int c = 0; c < CHANNELS; c += BLOCK) {
            convolve_image(scratch.padded, side, weight + c, scratch.values);
            normalize_and_pool(scratch.values, side, norm, image, c, scratch.pooled);
            map_to_tiles(scratch.pooled, half, {planes, plane}, image * tiles, c);
        }
    }
}

// The output transform of block 2, the rest of it, and the input transform of block 3; side: of block 2's maps.
// values: (n, 8, side^2, 16), kept for the way back.
void middle_forward(
    Stored* products, long products_plane, int n, int side, NormData norm, float* values, Stored* planes, long plane,
    float* pooled
) {
    const int half = side / 2;
    const long tiles = long(side / 4) * (side / 4), next_tiles = long(half / 4) * (half / 4);
    std::memset(pooled, 0, sizeof(float) * (half + 2) * (half + 2) * BLOCK);
    for_each_block(n, side, values, [&](long image, int c, float* block) {
        tiles_to_outputs({products, products_plane}, image * tiles, c, side, block);
        normalize_and_pool(block, side, norm, image, c, pooled);
        map_to_tiles(pooled, half, {planes, plane}, image * next_tiles, c);
    });
}

// The output transform of block 3 and the rest of it. embedding: (n, 128 (side / 2)^2), ordered channel by channel.
void last_forward(
    Stored* products, long products_plane, int n, int side, NormData norm, float* values, float* embedding, float* pooled
) {
    const long tiles = long(side / 4) * (side / 4);
    for_each_block(n, side, values, [&](long image, int c, float* block) {
        tiles_to_outputs({products, products_plane}, image * tiles, c, side, block);
        normalize_and_pool(block, side, norm, image, c, pooled);
        for_each_pooled(side / 2, [&](int place) { *embedding++ = pooled[place]; });
    });
}

// The way back of last_forward: values become their gradients, and the transformed tiles of those go to `planes`.
void last_backward(
    const float* embedding_gradient, int n, int side, NormData norm, float* values, Stored* planes, long plane,
    float* pooled
) {
    const long tiles = long(side / 4) * (side / 4);
    for_each_block(n, side, values, [&](long image, int c, float* block) {
        for_each_pooled(side / 2, [&](int place) { pooled[place] = *embedding_gradient++; });
        normalize_and_pool_back(block, side, norm, image, c, pooled);
        tiles_to_outputs_back(block, side, {planes, plane}, image * tiles, c);
    });
}

// The way back of middle_forward, from the gradients of block 3's transformed tiles.
void middle_backward(
    Stored* tile_gradients, long tile_plane, int n, int side, NormData norm, float* values, Stored* planes, long plane,
    float* pooled
) {
    const int half = side / 2;
    const long tiles = long(side / 4) * (side / 4), next_tiles = long(half / 4) * (half / 4);
    for_each_block(n, side, values, [&](long image, int c, float* block) {
        map_to_tiles_back({tile_gradients, tile_plane}, image * next_tiles, c, half, pooled);
        normalize_and_pool_back(block, side, norm, image, c, pooled);
        tiles_to_outputs_back(block, side, {planes, plane}, image * tiles, c);
    });
}

// Gradients of block 1's convolution in one image and 16 channels, into `scratch.values`. The convolution is computed
// again: that costs less than keeping its outputs, which are four times as large as all else, in memory.
static void convolution_gradients(
    Planes tile_gradients, long image, int c, int side, const Word* weight, const NormData& norm, const Scratch& scratch
) {
    const int half = side / 2;
    map_to_tiles_back(tile_gradients, image * (half / 4) * (half / 4), c, half, scratch.pooled);
    convolve_image(scratch.padded, side, weight + c, scratch.values);
    normalize_and_pool_back(scratch.values, side, norm, image, c, scratch.pooled);
}

// The way back of first_forward to the images, which are to be optimized; the network's weights stay.
// weight_rows: (128 / PAIR, 32), see convolve_image_to_columns; columns: (side^2, 32) of scratch memory.
// image_gradients: (n, 3, side, side).
void first_backward_to_images(
    Stored* tile_gradients, long tile_plane, const float* images, int n, int side, const Word* weight,
    const Word* weight_rows, NormData norm, float* image_gradients, float* columns, float* memory
) {
    const long pixels = long(side) * side;
    const Scratch scratch(memory, side);
    for (long image = 0; image < n; image++) {
        pad_image(images + image * 3 * pixels, side, scratch.padded);
        std::memset(columns, 0, sizeof(float) * pixels * COLUMN);
        for (int c = 0; c < CHANNELS; c += BLOCK) {
            convolution_gradients({tile_gradients, tile_plane}, image, c, side, weight, norm, scratch);
            convolve_image_to_columns(scratch.values, side, weight_rows + c / PAIR * COLUMN, columns);
        }
        columns_to_image(columns, side, scratch.padded, image_gradients + image * 3 * pixels);
    }
}

// The way back of first_forward to the weights.
void first_backward(
    Stored* tile_gradients, long tile_plane, const float* images, int n, int side, const Word* weight, NormData norm,
    float* weight_gradient, float* memory
) {
    const Scratch scratch(memory, side);
    for (long image = 0; image < n; image++) {
        pad_image(images + image * 3 * side * side, side, scratch.padded);
        for (int c = 0; c < CHANNELS; c += BLOCK) {
            convolution_gradients({tile_gradients, tile_plane}, image, c, side, weight, norm, scratch);
            convolve_image_back(scratch.padded, side, scratch.values, weight_gradient + c);
        }
    }
}

}  // extern "C"

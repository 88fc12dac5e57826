// The interactive part of inside_page.html, after report.js, whose helpers it uses. `forward` computes the network.

/** Sums of products of a convolution, a locally connected or a dense layer; see core/ops.py for the layouts. */
function linear(layer, x, [height, width, channels]) {
  const { kind, features, groups, kernel: size = 1, stride = 1, padding: [before, after] = [0, 0] } = layer;
  const { weights, bias } = layer, inputs = channels / groups, outputs = features / groups;
  if (kind === 'fc') {
    const y = Float64Array.from(bias), count = height * width * inputs;
    for (let g = 0; g < groups; g++) {
      for (let i = 0; i < count; i++) {
        const value = x[Math.floor(i / inputs) * channels + g * inputs + (i % inputs)];
        if (value !== 0) for (let o = g * outputs; o < (g + 1) * outputs; o++) y[o] += value * weights[i * features + o];
      }
    }
    return [Float32Array.from(y), [1, 1, features]];
  }
  const rows = Math.floor((height + before + after - size) / stride) + 1, area = size * size;
  const columns = Math.floor((width + before + after - size) / stride) + 1;
  const y = new Float32Array(rows * columns * features), sums = new Float64Array(features);
  for (let p = 0; p < rows * columns; p++) {
    const top = Math.floor(p / columns) * stride - before, left = (p % columns) * stride - before;
    const local = kind === 'local';
    for (let o = 0; o < features; o++) sums[o] = bias[local ? p * features + o : o];
    for (let k = 0; k < area; k++) {
      const row = top + Math.floor(k / size), column = left + (k % size);
      if (row < 0 || column < 0 || row >= height || column >= width) continue;
      for (let c = 0; c < channels; c++) {
        const value = x[(row * width + column) * channels + c];
        if (value === 0) continue;
        const group = Math.floor(c / inputs), i = c - group * inputs;
        const start = features * (local ? p * area * inputs + i * area + k : k * inputs + i);
        for (let o = group * outputs; o < (group + 1) * outputs; o++) sums[o] += value * weights[start + o];
      }
    }
    y.set(sums, p * features);
  }
  return [y, [rows, columns, features]];
}

/** x / (k + alpha * sum of x^2 over a window)^beta. `neighbors(i)` lists the positions of the window around i. */
function normalize(x, { k, alpha, beta }, neighbors) {
  return x.map((value, i) => {
    let sum = 0;
    for (const j of neighbors(i)) sum += x[j] * x[j];
    return value / (k + alpha * sum) ** beta;
  });
}

/** Positions of a window of n that begins n // 2 before i, inside of [low, high). */
function range(i, n, low, high) {
  const first = Math.max(low, i - Math.floor(n / 2)), last = Math.min(high, i - Math.floor(n / 2) + n);
  return Array.from({ length: Math.max(0, last - first) }, (_, j) => first + j);
}

function pool(x, [height, width, channels], { window, stride }, mean) {
  const count = (size) => 1 + Math.ceil((size - window) / stride); // the edge truncates the last window
  const rows = count(height), columns = count(width), y = new Float32Array(rows * columns * channels);
  for (let i = 0; i < y.length; i++) {
    const c = i % channels, p = Math.floor(i / channels), top = Math.floor(p / columns) * stride, left = (p % columns) * stride;
    let most = -Infinity, sum = 0, inside = 0;
    for (let row = top; row < Math.min(height, top + window); row++) {
      for (let column = left; column < Math.min(width, left + window); column++) {
        const value = x[(row * width + column) * channels + c];
        most = Math.max(most, value);
        sum += value;
        inside++;
      }
    }
    y[i] = mean ? sum / inside : most;
  }
  return [y, [rows, columns, channels]];
}

const operations = {
  relu: (x, shape) => [x.map((value) => Math.max(0, value)), shape],
  tanh: (x, shape) => [x.map(Math.tanh), shape],
  dropout: (x, shape, network) => [x.map((value) => value * network.dropout), shape], // the factor at test time
  lrn(x, shape, { lrn }) {
    const channels = shape[2], size = channels / lrn.groups;
    const windows = Array.from({ length: channels }, (_, c) => range(c, lrn.n, c - (c % size), c - (c % size) + size));
    return [normalize(x, lrn, (i) => windows[i % channels].map((c) => i - (i % channels) + c)), shape];
  },
  spatial_norm(x, shape, { spatial }) {
    const [height, width, channels] = shape;
    return [normalize(x, spatial, (i) => {
      const c = i % channels, p = Math.floor(i / channels), columns = range(p % width, spatial.n, 0, width);
      const rows = range(Math.floor(p / width), spatial.n, 0, height);
      return rows.flatMap((row) => columns.map((column) => (row * width + column) * channels + c));
    }), shape];
  },
  pool: (x, shape, network) => pool(x, shape, network.pool, false),
  avg_pool: (x, shape, network) => pool(x, shape, network.pool, true),
};

function softmax(logits) {
  const most = Math.max(...logits), powers = Array.from(logits, (x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((x) => x / sum);
}

/** Computes the network for a picture. silenced[layer] is a set of units whose output is set to zero.
 * Returns the output of each layer, of its last operation before dropout, and the probabilities. */
function forward(picture, silenced) {
  const { network, slide, side } = data, outputs = [];
  let x = inputOf(picture), shape = [side, side, 3];
  data.layers.forEach((layer, l) => {
    [x, shape] = linear(layer, x, shape);
    layer.ops.forEach((op, i) => {
      if (i === layer.before) record();
      [x, shape] = operations[op](x, shape, network);
    });
    if (layer.before === layer.ops.length) record();
    function record() {
      const units = silenced[l], channels = shape[2];
      if (units.size) x = x.map((value, i) => (units.has(i % channels) ? 0 : value));
      outputs.push(x);
    }
  });
  return { outputs, probabilities: softmax(x) };
}

const background = floats(data.network.background); // the input of the network is byte / std + background
function inputOf(picture) {
  return Float32Array.from(background, (value, i) => pictures[picture][i] / data.network.std[i % 3] + value);
}

function inside(section) {
  const find = (name) => section.querySelector('.' + name);
  const { layers, side, small } = data;
  const silenced = layers.map(() => new Set());
  let picture = 0, chosen = [0, 0], shown, plain, wasChosen = false;

  /** The values of unit u of layer l, for the picture: [height, width]. */
  function mapOf(l, u) {
    const { shape: [height, width, channels] } = layers[l];
    if (small) return Float32Array.from({ length: height * width }, (_, p) => shown.outputs[l][p * channels + u]);
    const { scale, bytes: text } = layers[l].maps[picture], map = layers[l].map, at = layers[l].units.indexOf(u);
    const values = (layers[l].decoded[picture] ||= bytes(text));
    return Float32Array.from({ length: map * map }, (_, p) => ((values[at * map * map + p] - 128) / 127) * scale);
  }

  const sideOf = (l) => (small ? layers[l].shape[0] : layers[l].map);
  function nameOf(l, u) {
    const name = `${layers[l].name}, ${layers[l].kind === 'fc' ? 'unit' : 'map'} ${u}`;
    return l === layers.length - 1 ? `${name}: ${data.class_names[u]}` : name;
  }

  const towerOf = (l, u) => Math.floor(u / (layers[l].shape[2] / layers[l].towers));

  function addLayers() {
    layers.forEach((layer, l) => {
      const div = make('div', { className: 'layer' });
      const [height, width, channels] = layer.shape;
      div.append(make('h3', { textContent: `${layer.name}: ${layer.title}` }), make('p', { className: 'note', textContent: layer.note }));
      const towers = make('div', { className: 'towers' });
      layer.buttons = new Map();
      for (let t = 0; t < layer.towers; t++) {
        const tower = make('div', { className: 'tower' });
        if (layer.towers > 1) {
          const heading = make('h4', { textContent: `tower ${t}` });
          if (small) heading.append(layer.towerButtons[t] = make('button', { type: 'button', textContent: `Silence tower ${t}`, onclick: () => silenceTower(l, t) }));
          tower.append(heading);
        }
        const units = make('div', { className: `units ${layer.kind === 'fc' ? 'dense' : ''}` });
        units.setAttribute('role', 'group');
        units.setAttribute('aria-label', `${layer.name}${layer.towers > 1 ? `, tower ${t}` : ''}: arrow keys move, Enter silences`);
        const all = small ? Array.from({ length: channels }, (_, u) => u) : layer.units;
        for (const u of all.filter((u) => towerOf(l, u) === t)) units.append(unitButton(l, u, units));
        units.firstChild.tabIndex = 0;
        keys(units, { ArrowRight: () => step(units, 1), ArrowLeft: () => step(units, -1), ArrowDown: () => step(units, 0, 1), ArrowUp: () => step(units, 0, -1) });
        tower.append(units);
        towers.append(tower);
      }
      div.append(towers);
      find('layers').append(div);
    });
  }

  function make(name, properties) {
    return Object.assign(document.createElement(name), properties);
  }

  function unitButton(l, u) {
    const button = make('button', { type: 'button', tabIndex: -1 });
    if (layers[l].kind !== 'fc') button.append(document.createElement('canvas'));
    button.addEventListener('pointerenter', (event) => event.pointerType === 'mouse' && choose(l, u));
    button.addEventListener('pointerdown', () => { wasChosen = chosen[0] === l && chosen[1] === u; });
    button.addEventListener('focus', () => choose(l, u));
    // The first tap on a touch screen shows a unit, the second silences it. `detail` is 0 for keys.
    button.addEventListener('click', (event) => (event.detail === 0 || wasChosen ? silence(l, u) : choose(l, u)));
    layers[l].buttons.set(u, button);
    return button;
  }

  /** Moves the focus within the units of a tower, which are one stop of the tab key, by units or by rows. */
  function step(units, by, rows = 0) {
    const all = [...units.children], at = all.indexOf(document.activeElement);
    const inRow = Math.max(1, all.filter((button) => button.offsetTop === all[0].offsetTop).length);
    const to = at + by + rows * inRow;
    if (at < 0 || to < 0 || to >= all.length) return;
    all[at].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  }

  function drawLayers() {
    layers.forEach((layer, l) => {
      const size = sideOf(l);
      const maps = new Map([...layer.buttons.keys()].map((u) => [u, mapOf(l, u)]));
      const scale = [...maps.values()].reduce((most, map) => map.reduce((a, b) => Math.max(a, Math.abs(b)), most), 0) || 1;
      for (const [u, button] of layer.buttons) {
        const map = maps.get(u), most = map.reduce((a, b) => Math.max(a, b));
        if (layer.kind === 'fc') button.style.background = `rgb(${diverging(map[0] / scale).map(Math.round)})`;
        else paint(button.firstChild, size, size, (r, c) => diverging(map[r * size + c] / scale));
        const off = silenced[l].has(u);
        button.setAttribute('aria-label', `${nameOf(l, u)}, ${off ? 'silenced' : short(most)}`);
        if (small) button.setAttribute('aria-pressed', off);
      }
      layer.towerButtons.forEach((button, t) => button.setAttribute('aria-pressed', unitsOf(l, t).every((u) => silenced[l].has(u))));
    });
  }

  const unitsOf = (l, t) => {
    const size = layers[l].shape[2] / layers[l].towers;
    return Array.from({ length: size }, (_, i) => t * size + i);
  };

  function drawLabels() {
    const list = small ? best(shown.probabilities) : data.labels[picture], changed = small && silenced.some((units) => units.size);
    find('bars').replaceChildren();
    for (const { label, index, probability } of list) {
      const percent = (p) => `${(100 * p).toFixed(1)}%`;
      const was = changed ? ` (was ${percent(plain.probabilities[index])})` : '';
      const bar = make('dd', { className: 'bar' });
      bar.style.width = `${100 * probability}%`;
      find('bars').append(make('dt', { textContent: label, title: label }), make('dd', { textContent: percent(probability) + was }), bar);
    }
  }

  function best(probabilities) {
    const order = probabilities.map((p, index) => ({ label: data.class_names[index], index, probability: p }));
    return order.sort((a, b) => b.probability - a.probability).slice(0, 5);
  }

  function drawUnit() {
    const [l, u] = chosen, layer = layers[l], map = mapOf(l, u), size = sideOf(l);
    const first = map.reduce((most, value, i) => (value > map[most] ? i : most), 0);
    const inPage = [Math.floor(first / size), first % size, map[first]]; // the stored maps are smaller
    const [row, column, most] = small ? inPage : layer.maxima[picture][layer.units.indexOf(u)];
    const [top, bottom] = layer.spans[row], [left, right] = layer.spans[column];
    const off = silenced[l].has(u), tower = layer.towers > 1 ? ` (tower ${towerOf(l, u)})` : '';
    find('unit').textContent = `${nameOf(l, u)}${tower}`;
    drawField(most === 0 ? null : [left, top, right - left, bottom - top]);
    const where = layer.kind === 'fc' ? '' : ` at row ${row}, column ${column}`;
    const see = layer.kind === 'fc' ? 'It sees the whole image.' : `It sees ${bottom - top} x ${right - left} pixels there.`;
    const active = `Its largest value for this image is ${short(most)}${where}. ${see}`;
    find('about').textContent = off ? 'Silenced: its output is zero.' : most === 0 ? 'It is not active for this image.' : active;
    const rows = `Rows ${top} to ${bottom - 1}, columns ${left} to ${right - 1} of `;
    find('field').setAttribute('aria-label', `${most === 0 ? '' : rows}${data.captions[picture]}`);
    find('silence').textContent = off ? 'Restore this unit' : 'Silence this unit';
    for (const other of layers) for (const button of other.buttons.values()) button.removeAttribute('aria-current');
    layer.buttons.get(u).setAttribute('aria-current', true);
    drawPictures(layer, layer.units.indexOf(u));
  }

  /** Draws the picture, and darkens all of it but a field [left, top, width, height], or nothing for null. */
  function drawField(field) {
    const canvas = find('field'), zoom = Math.max(1, Math.floor(336 / side)), still = document.createElement('canvas');
    paintPicture(still, picture);
    canvas.width = canvas.height = zoom * side;
    const context = canvas.getContext('2d');
    context.imageSmoothingEnabled = false;
    context.drawImage(still, 0, 0, zoom * side, zoom * side);
    if (!field) return;
    context.fillStyle = 'rgb(0 0 0 / 55%)';
    const box = field.map((x) => zoom * x);
    context.beginPath(); // everything but the field
    context.rect(0, 0, zoom * side, zoom * side);
    context.rect(...box);
    context.fill('evenodd');
    for (const [width, color] of [[8, '#000'], [4, '#f0e442']]) {
      context.lineWidth = width;
      context.strokeStyle = color;
      context.strokeRect(...box);
    }
  }

  /** Draws the patches and the projection of a unit, tiles of one row of the layer's sprite. */
  function drawPictures(layer, at) {
    for (const figure of section.querySelectorAll('.pictured')) figure.style.visibility = at < 0 ? 'hidden' : '';
    if (at < 0) {
      find('about').textContent += ` Patches are stored for ${layer.units.length} of the ${layer.shape[2]} units of this layer, not for this one.`;
      return;
    }
    if (!layer.sprite) {
      layer.sprite = make('img', { src: `data:image/jpeg;base64,${layer.tiles}` });
      layer.sprite.addEventListener('load', () => layers[chosen[0]] === layer && drawUnit());
    }
    const { tile, inner, sprite } = layer, count = layer.values[at].length, patches = find('patches'), projection = find('projection');
    patches.width = patches.height = 3 * (inner + 2) - 2;
    projection.width = projection.height = inner;
    const active = layer.values[at][0] > 0;
    const values = `${short(layer.values[at][0])} to ${short(layer.values[at][count - 1])}`;
    find('patches-note').textContent = active ? `, values ${values}` : ': not active for any image';
    find('projection-note').textContent = data.projection;
    patches.setAttribute('aria-label', active ? `The patches that excite it most, values ${values}` : 'No patches: it is not active for any image');
    projection.setAttribute('aria-label', `${data.projection} of the first patch`);
    if (!sprite.complete) return;
    const copy = (canvas, i, x, y) => canvas.getContext('2d').drawImage(sprite, i * tile, at * tile, inner, inner, x, y, inner, inner);
    for (let i = 0; active && i < count; i++) copy(patches, i, (i % 3) * (inner + 2), Math.floor(i / 3) * (inner + 2));
    if (active) copy(projection, count, 0, 0);
  }

  function choose(l, u) {
    if (chosen[0] === l && chosen[1] === u) return;
    chosen = [l, u];
    drawUnit();
  }

  function draw() {
    if (small) {
      shown = forward(picture, silenced);
      const texts = layers.flatMap((layer, l) => describe(layer, l));
      find('silenced').textContent = texts.length ? `Silenced: ${texts.join('; ')}.` : '';
    }
    drawLayers();
    drawLabels();
    drawUnit();
  }

  /** Names the silenced units of a layer; whole towers and more than eight units are abbreviated. */
  function describe(layer, l) {
    const texts = [], towers = layer.towers > 1 ? [...Array(layer.towers).keys()].filter((t) => unitsOf(l, t).every((u) => silenced[l].has(u))) : [];
    texts.push(...towers.map((t) => `tower ${t} of ${layer.name}`));
    const rest = [...silenced[l]].filter((u) => !towers.includes(towerOf(l, u))).sort((a, b) => a - b);
    if (rest.length) texts.push(`${layer.name} ${rest.length > 8 ? `${rest.length} units` : rest.join(', ')}`);
    return texts;
  }

  function silence(l, u) {
    if (!small) return choose(l, u);
    if (!silenced[l].delete(u)) silenced[l].add(u);
    chosen = [l, u];
    draw();
  }

  function silenceTower(l, t) {
    const units = unitsOf(l, t), off = units.every((u) => silenced[l].has(u));
    for (const u of units) off ? silenced[l].delete(u) : silenced[l].add(u);
    draw();
  }

  function choosePicture(i) {
    picture = i;
    if (small) plain = forward(i, layers.map(() => new Set()));
    draw();
  }

  for (const layer of layers) {
    layer.towerButtons = [];
    layer.decoded = [];
    if (small) for (const name of ['weights', 'bias']) layer[name] = floats(layer[name]);
  }
  find('how').textContent = data.how;
  find('editing').hidden = !small;
  find('silence').addEventListener('click', () => silence(...chosen));
  find('restore').addEventListener('click', () => { silenced.forEach((units) => units.clear()); draw(); });
  choices(find('pictures'), 'inside-picture', data.captions, paintPicture, choosePicture);
  addLayers();
  chosen = [0, layers[0].buttons.keys().next().value];
  choosePicture(0);
  return { forward };
}

window.inside = inside(document.getElementById('network'));

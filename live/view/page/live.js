// A live operation: what `stream` writes, frame by frame, as rows that grow.

class Ribbon {
  constructor() {
    this.starts = [];
    this.ends = [];
    this.numbers = [];
  }

  // The sample that begins at `time`; the one before it ends there.
  add(time, number) {
    const last = this.numbers.length - 1;
    if (last >= 0) this.ends[last] = time;
    if (last >= 0 && this.numbers[last] === number) return;
    this.starts.push(time);
    this.ends.push(time);
    this.numbers.push(number);
  }
}

const MOST_SAMPLES = 1_000_000;

export class Live {
  // `told` is called after each message.
  constructor(name, told) {
    this.name = name;
    this.told = told;
    this.skipped = 0;
    this.clear();
    this.events = new EventSource("/api/live");
    this.events.onmessage = (event) => this.take(JSON.parse(event.data));
    this.events.onopen = () => {
      this.clear(); // the server tells everything from the beginning
      this.told();
    };
  }

  clear() {
    this.classes = { phase: [] };
    this.tools = [];
    this.tracks = { phase: new Ribbon() };
    this.ofTools = [];
    this.edges = [];
    this.strip = [];
    this.values = [];
    this.last = null;
  }

  take(news) {
    if (news.reset) this.clear();
    this.classes = news.classes;
    this.tools = news.tools;
    this.skipped += news.skipped;
    for (const row of news.rows) this._add(row);
    this.told();
  }

  _add([time, since, delay, phase, probability, tools, tracks]) {
    this.tracks.phase.add(time, phase);
    for (const [track, [number]] of Object.entries(tracks)) (this.tracks[track] ??= new Ribbon()).add(time, number);
    if (this.edges.length < MOST_SAMPLES) {
      this.edges.push(time);
      this.strip.push(probability * 255);
      tools.forEach((value, number) => {
        const of = (this.values[number] ??= new Array(this.edges.length - 1).fill(0));
        of.push(value * 255);
      });
      tools.forEach((value, number) => (this.ofTools[number] ??= new Ribbon()).add(time, value >= 0.5 ? number : -1));
    }
    this.last = { time, since, delay, phase, probability };
  }

  get end() {
    return this.last ? this.last.time : 0;
  }

  // Seconds in each class so far.
  seconds(track) {
    const { starts, ends, numbers } = this.tracks[track] ?? new Ribbon();
    const sums = {};
    numbers.forEach((number, i) => {
      const name = this.classes[track][number];
      sums[name] = (sums[name] ?? 0) + ends[i] - starts[i];
    });
    return sums;
  }

  rows() {
    const rows = Object.entries(this.tracks).map(([track, ribbon]) => ({
      title: track === "phase" ? this.name : `${this.name}, ${track}`,
      track,
      own: false,
      lanes: [{ title: "", label: null, ...ribbon }],
      edges: this.edges,
      strip: track === "phase" ? this.strip : null,
    }));
    if (this.tools.length) {
      const lanes = this.tools.map((title, number) => this._toolLane(title, number));
      rows.push({ title: "tools", track: "tool", own: false, several: true, lanes, edges: this.edges, strip: null });
    }
    return rows;
  }

  _toolLane(title, number) {
    const ribbon = this.ofTools[number] ?? new Ribbon();
    const keep = ribbon.numbers.map((value, i) => (value >= 0 ? i : -1)).filter((i) => i >= 0);
    const pick = (array) => keep.map((i) => array[i]);
    const [starts, ends, numbers] = [ribbon.starts, ribbon.ends, ribbon.numbers].map(pick);
    return { title, label: title, starts, ends, numbers, values: this.values[number] ?? [] };
  }
}

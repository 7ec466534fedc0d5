// Browsers start no Worker from a file:// page. There, a hidden frame of the page runs the worker's script instead.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      const inside = frame.contentWindow;
      const load = (source) =>
        new Promise((resolve, reject) => {
          const script = inside.document.createElement("script");
          Object.assign(script, { src: source, onload: resolve, onerror: reject });
          inside.document.head.append(script);
        });
      const deliver = (target, data) => target.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...sources) => sources.reduce((done, source) => done.then(() => load(source)), Promise.resolve());
      inside.postMessage = (data) => deliver(this, data);
      const loaded = load(url);
      this.postMessage = (data) => loaded.then(() => deliver(inside, data));
      this.terminate = () => frame.remove();
    }
  };

// The search runs in a worker, and browsers start none from file://. There, a hidden frame runs the worker's script.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inner = frame.contentWindow;
      inner.importScripts = (...scripts) => scripts.reduce(
        (before, script) => before.then(() => load(inner, script)), Promise.resolve());
      // The worker posts to its page and listens for the page's messages, as it would in a thread of its own.
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inner = inner;
      load(inner, url).then(() => {
        const waiting = this.waiting;
        this.waiting = null;
        waiting.forEach((data) => this.postMessage(data));
      });
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.inner.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.inner.frameElement.remove();
    }
  };
}

function load(inner, script) {
  return new Promise((resolve, reject) => {
    const element = inner.document.createElement("script");
    element.src = script;
    element.onload = resolve;
    element.onerror = () => reject(new Error(`cannot load ${script}`));
    inner.document.body.appendChild(element);
  });
}
